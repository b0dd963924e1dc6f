"""Data sets, transforms and loaders: from files to batches."""
