"""The command line from a checkout: `python main.py --help`."""

from d2dpm_jax.command import main

if __name__ == '__main__':
  main.run()
