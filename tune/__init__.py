"""Ray Tune: searches hyperparameters; each trial is a train run (`tune.search.search`)."""
