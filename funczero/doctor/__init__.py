"""`funczero doctor`: what this machine has, what of it funczero uses, and whether two processes of it train."""
