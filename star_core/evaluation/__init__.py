"""Measures of the tokenizer's and the generator's pictures: PSNR, LPIPS, FID, KID, R-precision.

Evaluation imports the engine and the training package's data sets; the engine imports neither.
Pictures are uint8 arrays (N, H, W, 3) everywhere here, except in `lpips`, which is a torch module
so that training can use it as a loss.
"""
