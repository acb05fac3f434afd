"""Post-training quantization of Linen models: pure functions over pytrees."""
