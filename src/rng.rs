//! torch's CPU random numbers, bit for bit.
