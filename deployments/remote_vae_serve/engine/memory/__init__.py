"""The memory of a device: its budget, what work takes of it, what is kept, and what to do when it runs out."""
