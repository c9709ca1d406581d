"""What belongs to one chapter: its kernels, its bookkeeping, its stories. No chapter needs another's."""
