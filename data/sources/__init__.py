"""Where images come from: folders, lists, tar shards, IDX files, the demo set."""
