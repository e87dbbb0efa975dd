"""Which words look at the image? log p(token | m_w) - log p(token | m_l) of each token of y_w and y_l, in nats.

    python examples/words.py --model M --adapter RUN --data FILE --to words.html   # or words.png: one example
    python examples/words.py --study 0 1 2                                         # on the seeds of miniature.py

Blue: the token is likelier with the image; red: with the rejected one. Without --adapter: the base model alone.

The study asks this in the world of `shapes.py`. For the base, DPO and mDPO of `miniature.py --quick`, it takes
the tokens of y_w of 200 held-out pairs: mean difference of colour and shape words, and of all other tokens. m_l
is a crop, as in training, or another image, which no training saw.

Predicted before any run of it, for each seed:
1. The base can see: its colour and shape words are above its other tokens, with either m_l.
2. mDPO's colour and shape words are above DPO's, with either m_l.
3. With another image as m_l, mDPO's gap (colour and shape words minus other tokens) is above DPO's. With a crop
   we predict nothing: the loss is of whole responses, and a crop of so small a picture is seen at a glance, so
   that any token may carry the difference.
4. DPO hardly changes where the words look: with a crop, its colour and shape words are off the base's by less
   than half as much as mDPO's.
"""
