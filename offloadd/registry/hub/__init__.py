"""Downloads from a Hugging Face hub into `models_path`: what to take, a program that takes it, and jobs that run that program."""
