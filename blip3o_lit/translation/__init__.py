"""From raw tokens to raw tokens, and from pictures to tokens and captions."""
