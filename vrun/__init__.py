"""vrun: run guests in their own contexts on a stock kernel."""
