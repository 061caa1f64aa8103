"""What drafts beside the exit branch, and the bandit that chooses between sources."""
