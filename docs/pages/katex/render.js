// Typesets what the builder marked as mathematics; KaTeX is vendored beside this file, so that nothing is fetched.
document.addEventListener("DOMContentLoaded", () => {
  for (const node of document.querySelectorAll(".arithmatex")) {
    const display = node.textContent.trim().startsWith("\\[");
    const tex = node.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
    katex.render(tex, node, { displayMode: display, throwOnError: false, strict: "error" });
  }
});
// What scrolls can be reached and scrolled by the keyboard; the theme has put its wrappers around tables by then.
window.addEventListener("load", () => {
  for (const node of document.querySelectorAll(".katex-display, pre > code, .md-typeset__scrollwrap")) {
    if (node.scrollWidth > node.clientWidth) node.tabIndex = 0;
  }
});
