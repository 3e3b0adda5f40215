"""An hour of everything at once against one daemon, to see whether anything in it grows: ``python -m bench.churn``."""
