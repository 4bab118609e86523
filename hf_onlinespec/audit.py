"""stub"""


def check_privacy(draft: object) -> None: ...
