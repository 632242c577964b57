"""`python -m cspdeploy`: the command where its script is not on the path, as under `torchrun -m cspdeploy`."""

from cspdeploy.cli.app import entry_point

if __name__ == "__main__":
    entry_point()
