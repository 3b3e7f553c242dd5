"""The shard controller: which group owns which key range, replicated, with its whole history."""
