"""What scripts/gpu-check consists of; command.py is where to begin."""
