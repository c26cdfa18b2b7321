"""`python -m pld_ray.cli`, the same as `pld-ray`."""

from pld_ray.cli.main import main

main()
