"""The models: one a file, all of the form of SequentialModel."""
