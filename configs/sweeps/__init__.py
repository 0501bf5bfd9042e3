"""Configurations of sweeps: `videoreason sweep --config NAME`."""
