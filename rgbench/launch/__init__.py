"""Many processes: what the ranks of a run say to one another, and how they are started."""
