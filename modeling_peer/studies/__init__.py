"""Studies: feed-forwards trained side by side at an equal budget, as scripts/compare_feed_forwards.py asks."""
