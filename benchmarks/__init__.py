"""What serving costs, ours and others' side by side: `python -m benchmarks`. How replicas follow a load: scaling.py."""
