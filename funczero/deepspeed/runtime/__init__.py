"""Places where user code looks for parts of DeepSpeed's runtime."""
