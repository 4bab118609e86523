"""stub"""


def check_privacy(draft): ...
