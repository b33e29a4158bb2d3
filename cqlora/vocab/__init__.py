"""Chinese vocabularies: training, merging, initialising new rows."""
