"""Ray Train: prepares a log and fine-tunes a sequential recommender on it (`train.fit.fit`)."""
