// Before the first paint, so that the page does not flash in the other colours.
try {
  const theme = JSON.parse(localStorage.getItem("langmill.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is off: the system's colours */ }
