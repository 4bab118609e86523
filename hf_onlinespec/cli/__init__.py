"""What the commands of `hf-onlinespec` do. Their options and help are in `hf_onlinespec_cli.py`, which imports nothing heavy."""
