"""One file per op: contract, reference, fake, autograd, registration."""
