"""Run the command line with `python -m pld_ray.cli`; it is the same as `pld-ray`."""

from pld_ray.cli.main import main

main()
