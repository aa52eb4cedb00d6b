"""How far quantized models are from their originals, ours beside everybody's: `python -m benchmarks.fidelity`."""
