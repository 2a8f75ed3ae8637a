"""The fused class-vector KL loss: `op` is the entry, `tiles` the CPU's path, the rest Triton.

Notation of every file here: W (N, D) class vectors; f (B, D) features of any length; per side
`z = scale · (f/‖f‖) Wᵀ / T`, `p = softmax(z)`, `lse = logsumexp(z)`, `o = p W`; the student is
`s`, the teacher `t`. The loss of a row is T² KL(p_t || p_s); its gradient needs o_s − o_t only,
so the B x N logits are never written. The package imports torch and triton alone, and triton
only once a kernel is launched.
"""
