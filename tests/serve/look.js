// What a page looks like: texts, icons and fields whose contrast with what lies behind them is too small (WCAG 2.2,
// 1.4.3 and 1.4.11), and what is too small to be touched (2.5.8).
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = (top, below) => top.slice(0, 3).map((value, at) => value * top[3] + below[at] * (1 - top[3]));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, layer) => over(layer, below), [1, 1, 1]);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const found = [];
  let seen = 0;
  const check = (node, style, least, what) => {
    const ground = behind(what === "border" ? node.parentElement : node);
    const colour = rgba(what === "border" ? style.borderTopColor : style.color);
    const got = ratio(over(colour, ground), ground);
    seen += 1;
    if (got < least) found.push(`${what} of ${node.tagName}#${node.id}.${node.className}: ${got.toFixed(2)} < ${least}`);
  };
  for (const node of document.querySelectorAll("body, body *")) {
    if (!node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, noscript, .unseen")) continue;
    const style = getComputedStyle(node);
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const large = parseFloat(style.fontSize) >= 24;
    if (own || node.value) check(node, style, large ? 3 : 4.5, "text");
    if (node.placeholder) check(node, getComputedStyle(node, "::placeholder"), 4.5, "placeholder");
    if (node.tagName === "svg") check(node, style, 3, "icon");
    if (node.matches("input:not([type=checkbox]), .field")) check(node, style, 3, "border");
  }
  const small = [...document.querySelectorAll("button, select, summary, input:not([type=checkbox])")]
    .filter((node) => node.checkVisibility({ visibilityProperty: true }))
    .filter((node) => Math.min(node.offsetWidth, node.offsetHeight) < 24).map((node) => node.outerHTML);
  return { found, seen, small };
}
