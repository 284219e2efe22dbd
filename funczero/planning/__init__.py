"""Before a run: bytes of memory and on the wire, and seconds, of a step on any mesh, without processes or memory."""
