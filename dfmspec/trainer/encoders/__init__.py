"""Codecs and text encoders: pictures to latents and back, captions to embeddings.

The embedded ones (`dct`, `ngram`) need no weights and have the shapes of Cosmos-0.1-Tokenizer-CV4x8x8 and T5-11B. A
codec has `encode`, [T, H, W, 3] uint8 -> [16, T, H/8, W/8] fp32 of unit variance, and `decode`, its way back; a text
encoder has `encode`, a caption -> [L, 1024] fp32.
"""
