"""One command for one machine or a hostfile of them; every node runs torchrun's agent."""
