"""`python -m jax_videoreason` is `videoreason`."""

from jax_videoreason.cli import main

if __name__ == "__main__":
  raise SystemExit(main())
