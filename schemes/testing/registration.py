"""The hook of the entry point ``hypothesis``: ``st.from_type`` then draws a Tableau or a Scheme."""

from ..scheme import Scheme
from ..tableau import Tableau


def register() -> None:
    """Tells hypothesis how to draw tableaux and schemes; hypothesis calls this itself when it is installed.

    Hypothesis calls it at the end of its own import. That import may have been triggered by our strategies, which are
    then only half imported, so this module needs no strategy until one is drawn.

    Example:
        >>> from hypothesis import strategies as st
        >>> import schemes, schemes.testing
        >>> schemes.testing.register()
        >>> isinstance(st.from_type(schemes.Tableau).example(), schemes.Tableau)  # doctest: +SKIP
        True
    """
    from hypothesis import strategies as st

    def tableaux(_: type) -> st.SearchStrategy[Tableau]:
        from .strategies import tableaux

        return tableaux()

    def schemes(_: type) -> st.SearchStrategy[Scheme]:
        from .strategies import schemes

        return schemes()

    st.register_type_strategy(Tableau, tableaux)
    st.register_type_strategy(Scheme, schemes)
