"use strict";
// Draws the flame graph of the page's data. Names come from binaries that anyone may have written:
// they reach the page as text alone.
(() => {
  const ROW_PX = 18;
  const LEAST_PX = 1; // frames that would be narrower are not drawn
  const THIN_PX = 4; // frames that are narrower have no gap beside them
  const TEXT_PX = 26; // and frames that are narrower no text
  const MOST_ROWS = 500; // of the table of functions
  const KERNEL = 1, UNNAMED = 2, MARK = 4;
  const FIELDS = 6; // of a node: depth, function, samples to its left, total, own, guessed

  const data = JSON.parse(document.getElementById("data").textContent);
  const { functions, nodes, samples, period, in_cycles: inCycles } = data;
  const count = nodes.length / FIELDS;
  const depth = (i) => nodes[i * FIELDS];
  const functionOf = (i) => nodes[i * FIELDS + 1];
  const left = (i) => nodes[i * FIELDS + 2];
  const total = (i) => nodes[i * FIELDS + 3];
  const own = (i) => nodes[i * FIELDS + 4];
  const guessed = (i) => nodes[i * FIELDS + 5];

  // Nodes come in the order of a walk: those below a node follow it, up to `after`.
  const parent = new Int32Array(count).fill(-1);
  const after = new Int32Array(count).fill(count);
  let deepest = 0;
  const path = [];
  for (let i = 0; i < count; i++) {
    while (path.length > depth(i)) after[path.pop()] = i;
    if (path.length) parent[i] = path[path.length - 1];
    path.push(i);
    deepest = Math.max(deepest, depth(i));
  }

  const $ = (id) => document.getElementById(id);
  const graph = $("graph"), details = $("details"), search = $("search");
  let zoomed = 0, selected = -1, matches = null, flipped = false;
  let drawn = new Map();

  const share = (part) => (samples ? `${((100 * part) / samples).toFixed(2)}%` : "0%");
  const used = (part) =>
    `${((part * period) / 1e9).toPrecision(3)} ${inCycles ? "billion cycles" : "s"}`;
  const amount = (part) => `${part.toLocaleString("en")} (${share(part)}, ${used(part)})`;

  function label(i) {
    const [name, , flags] = functions[functionOf(i)];
    return (guessed(i) ? "~ " : "") + name + (flags & KERNEL ? " [k]" : "");
  }

  function classOf(i) {
    const flags = functions[functionOf(i)][2];
    const kind = flags & MARK ? "c" : flags & KERNEL ? "k" : flags & UNNAMED ? "n" : "u";
    return `f ${kind}${guessed(i) ? " g" : ""}`;
  }

  // The same function has the same shade everywhere; all are light enough for black text.
  function shade(i) {
    const at = functionOf(i);
    return `brightness(${0.94 + ((at * 7919) % 13) / 100})`;
  }

  function describe(i) {
    const [name, module, , allOwn, allTotal] = functions[functionOf(i)];
    const parts = [name];
    if (module) parts.push(`in ${module}`);
    parts.push(`self ${amount(own(i))}`, `total ${amount(total(i))}`);
    if (allTotal && (allTotal !== total(i) || allOwn !== own(i))) {
      parts.push(`everywhere: self ${share(allOwn)}, total ${share(allTotal)}`);
    }
    if (guessed(i)) parts.push(`${share(guessed(i) * (samples / total(i)))} of these by guess`);
    return parts.join(" \u2022 ");
  }

  function isMatch(i) {
    return matches !== null && matches.has(functionOf(i));
  }

  function place(i, x, width, isAbove) {
    const box = document.createElement("div");
    const pixels = width * graph.clientWidth;
    const thin = pixels < THIN_PX;
    box.className =
      classOf(i) + (thin ? " thin" : "") + (isAbove ? " above" : "") + (isMatch(i) ? " m" : "");
    box.dataset.node = i;
    box.textContent = pixels < TEXT_PX ? "" : label(i);
    box.style.left = `${100 * x}%`;
    box.style.width = `${100 * width}%`;
    const row = depth(i) * ROW_PX;
    box.style[flipped ? "bottom" : "top"] = `${row}px`;
    if (!isAbove && !isMatch(i)) box.style.filter = shade(i);
    if (i === selected) box.classList.add("at");
    drawn.set(i, box);
    return box;
  }

  function draw() {
    const page = document.createDocumentFragment();
    drawn = new Map();
    let rows = depth(zoomed);
    for (let i = parent[zoomed]; i >= 0; i = parent[i]) page.append(place(i, 0, 1, true));
    const whole = Math.max(total(zoomed), 1);
    const least = LEAST_PX / Math.max(graph.clientWidth, 1);
    for (let i = zoomed; i < after[zoomed]; ) {
      const width = total(i) / whole;
      if (width < least) {
        i = after[i];
        continue;
      }
      rows = Math.max(rows, depth(i));
      page.append(place(i, (left(i) - left(zoomed)) / whole, width, false));
      i++;
    }
    graph.replaceChildren(page);
    graph.style.height = `${(rows + 1) * ROW_PX + 2}px`;
    graph.classList.toggle("searched", matches !== null);
    $("back").disabled = zoomed === 0;
  }

  function zoom(i) {
    zoomed = i;
    draw();
    select(i);
  }

  function select(i) {
    drawn.get(selected)?.classList.remove("at");
    selected = i;
    details.textContent = i < 0 ? "" : describe(i);
    const box = drawn.get(i);
    box?.classList.add("at");
    box?.scrollIntoView({ block: "nearest" });
  }

  // Samples with a match anywhere on their stacks, each counted once.
  function matched() {
    let found = 0;
    for (let i = 0; i < count; ) {
      if (isMatch(i)) {
        found += total(i);
        i = after[i];
      } else {
        i++;
      }
    }
    return found;
  }

  function find(text) {
    const wanted = text.toLowerCase();
    matches = null;
    $("matched").textContent = "";
    if (wanted) {
      matches = new Set();
      functions.forEach(([name, , flags], at) => {
        if (!(flags & MARK) && name.toLowerCase().includes(wanted)) matches.add(at);
      });
      const names = `${matches.size.toLocaleString("en")} function${matches.size === 1 ? "" : "s"}`;
      $("matched").textContent = `${names}, ${share(matched())} of samples`;
    }
    draw();
    fillTable();
  }

  let order = "own";
  function fillTable() {
    const by = order === "own" ? 3 : 4;
    const rows = [...functions.keys()]
      .filter((at) => functions[at][4] && (matches === null || matches.has(at)))
      .sort((a, b) => functions[b][by] - functions[a][by] || a - b)
      .slice(0, MOST_ROWS)
      .map((at) => {
        const [name, module, flags, allOwn, allTotal] = functions[at];
        const row = document.createElement("tr");
        const cells = [share(allOwn), share(allTotal), "", name + (flags & KERNEL ? " [k]" : ""), module];
        cells.forEach((text) => row.insertCell().append(text));
        const outer = document.createElement("div"), inner = document.createElement("div");
        outer.style.width = `${(100 * allTotal) / Math.max(samples, 1)}%`;
        inner.style.width = `${(100 * allOwn) / Math.max(allTotal, 1)}%`;
        outer.append(inner);
        row.cells[2].className = "bar";
        row.cells[2].append(outer);
        row.title = name;
        row.tabIndex = 0;
        row.dataset.name = name;
        return row;
      });
    $("functions").tBodies[0].replaceChildren(...rows);
  }

  function showTable(shown) {
    $("functions").hidden = !shown;
    graph.hidden = shown;
    $("switch").setAttribute("aria-pressed", shown);
    if (!shown) draw();
  }

  const nodeAt = (event) => {
    const box = event.target.closest("[data-node]");
    return box ? Number(box.dataset.node) : -1;
  };

  graph.addEventListener("click", (event) => nodeAt(event) >= 0 && zoom(nodeAt(event)));
  graph.addEventListener("mouseover", (event) => {
    const i = nodeAt(event);
    if (i < 0) return;
    details.textContent = describe(i);
    event.target.title = describe(i);
  });
  graph.addEventListener("mouseleave", () => select(selected));

  function siblings(i) {
    const above = parent[i];
    if (above < 0) return [i];
    const found = [];
    for (let each = above + 1; each < after[above]; each = after[each]) found.push(each);
    return found;
  }

  graph.addEventListener("keydown", (event) => {
    const at = selected < 0 ? zoomed : selected;
    const beside = siblings(at);
    const inwards = flipped ? "ArrowUp" : "ArrowDown", outwards = flipped ? "ArrowDown" : "ArrowUp";
    const steps = {
      [inwards]: at + 1 < after[at] ? at + 1 : at,
      [outwards]: parent[at] < 0 ? at : parent[at],
      ArrowLeft: beside[beside.indexOf(at) - 1] ?? at,
      ArrowRight: beside[beside.indexOf(at) + 1] ?? at,
    };
    if (event.key === "Enter") zoom(at);
    else if (event.key in steps) select(steps[event.key]);
    else return;
    event.preventDefault();
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      if (document.activeElement === search && search.value) {
        search.value = "";
        find("");
      } else {
        zoom(0);
      }
    } else if (event.key === "/" && document.activeElement !== search) {
      event.preventDefault();
      search.focus();
    }
  });

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => find(search.value), 100);
  });
  $("back").addEventListener("click", () => zoom(0));
  $("flip").addEventListener("click", () => {
    flipped = !flipped;
    $("flip").setAttribute("aria-pressed", flipped);
    draw();
  });
  $("switch").addEventListener("click", () => showTable($("functions").hidden));
  const ofTable = $("functions");
  ofTable.tHead.addEventListener("click", (event) => {
    const by = event.target.dataset.by;
    if (!by) return;
    order = by;
    for (const cell of ofTable.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    event.target.closest("th").setAttribute("aria-sort", "descending");
    fillTable();
  });
  const searchRow = (event) => {
    const row = event.target.closest("tr");
    if (!row) return;
    search.value = row.dataset.name;
    find(search.value);
    showTable(false);
  };
  ofTable.tBodies[0].addEventListener("click", searchRow);
  ofTable.tBodies[0].addEventListener("keydown", (event) => event.key === "Enter" && searchRow(event));

  let width = 0;
  new ResizeObserver(() => {
    if (graph.clientWidth !== width && !graph.hidden) {
      width = graph.clientWidth;
      draw();
    }
  }).observe(graph);
  draw();
  fillTable();
})();
