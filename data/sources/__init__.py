"""Sources: folders, lists, tar shards, IDX files, the demo set."""
