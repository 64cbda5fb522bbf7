"""What this computer is and allows: processors, memory, limits, temperature. It knows nothing of models."""
