"""The two stages of the paper, one file each."""
