"""`make gpu-check`: what must be seen on a real GPU, in one command, on a machine with torch, transformers and peft."""
