"""What the subcommands of `lightning-prune` do beyond Lightning's own; `PruneTrainer` has a method for each."""
