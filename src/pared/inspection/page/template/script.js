"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = isDark() ? "Light theme" : "Dark theme"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  theme.hidden = false;
  name();

  const table = document.getElementById("rows");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const text = (row, column) => row.cells[column].textContent;
  const number = (words) => words === "" ? -Infinity : Number.parseFloat(words.replaceAll(",", ""));
  const keys = {
    text: (words) => words,
    number,
    shape: (words) => words === "" ? 0 : words.split("x").reduce((product, part) => product * (Number(part) || 1), 1),
    range: (words) => words === "" ? -1 : words.split(" to ").reduce((low, high) => high - low),
  };

  const sort = (column) => {
    const head = heads[column];
    const kind = head.dataset.kind;
    const first = kind === "text" ? "ascending" : "descending";
    const other = kind === "text" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    const key = keys[kind];
    const keyed = rows.map((row, place) => ({ row, place, key: key(text(row, column)) }));
    const compare = kind === "text"
      ? new Intl.Collator("en", { numeric: true }).compare
      : (a, b) => (a === b ? 0 : a < b ? -1 : 1);
    keyed.sort((a, b) => sign * compare(a.key, b.key) || a.place - b.place);
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sorted = document.createDocumentFragment();
    for (const one of keyed) sorted.append(one.row);
    body.append(sorted);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(column));
  });

  const search = document.getElementById("search");
  const left = document.getElementById("left");
  const count = document.getElementById("count");
  const place = heads.findIndex((head) => head.textContent === "bytes");
  const contents = rows.map((row) => row.textContent.toLowerCase());
  const sizes = rows.map((row) => number(text(row, place)));
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let bytes = 0;
    rows.forEach((row, i) => {
      const found = (word) => (word[0] === "^" ? contents[i].startsWith(word.slice(1)) : contents[i].includes(word));
      const fits = (!left.checked || row.classList.contains("fl")) && words.every(found);
      if (row.hidden === fits) row.hidden = !fits;
      if (fits) { shown += 1; bytes += sizes[i]; }
    });
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows, ${bytes.toLocaleString("en")} bytes`;
  };
  search.addEventListener("input", filter);
  left.addEventListener("change", filter);
  document.querySelector(".tools").hidden = false;
  filter();

  for (const tile of document.querySelectorAll("[data-find]")) {
    tile.addEventListener("click", () => {
      search.value = tile.dataset.find;
      left.checked = false;
      filter();
      document.getElementById("tensors").scrollIntoView();
    });
  }
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
  root.dataset.ready = "";
})();
