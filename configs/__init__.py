"""The configurations that ship: `--config NAME` or `--config NAME:key=value,...`."""
