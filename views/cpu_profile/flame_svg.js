"use strict";
// Zooms and searches the frames that the picture has already.
(() => {
  const LEFT = 12, WIDTH = 1176, CHARACTER = 7.3;
  const root = document.documentElement;
  const frames = [...document.querySelectorAll("g.f")].map((group) => {
    const [depth, left, total] = group.dataset.at.split(" ").map(Number);
    const [rect, text] = [group.querySelector("rect"), group.querySelector("text")];
    const about = group.querySelector("title").textContent;
    return { group, rect, text, depth, left, total, about, name: about.split("\n")[0] };
  });
  const samples = frames.length ? frames[0].total : 0;
  const details = document.getElementById("details");
  const matched = document.getElementById("matched");
  const search = document.getElementById("search");

  function show(frame, x, width) {
    frame.group.setAttribute("display", "inline");
    frame.rect.setAttribute("x", LEFT + x * WIDTH);
    frame.rect.setAttribute("width", Math.max(width * WIDTH - 0.5, 0.1));
    frame.text.setAttribute("x", LEFT + x * WIDTH + 3);
    const room = Math.floor((width * WIDTH - 6) / CHARACTER);
    const letters = [...frame.name];
    frame.text.textContent =
      room < 3 ? "" : letters.length <= room ? frame.name : letters.slice(0, room - 1).join("") + "\u2026";
  }

  function zoom(to) {
    const end = to.left + to.total;
    for (const frame of frames) {
      const above = frame.depth < to.depth && frame.left <= to.left && frame.left + frame.total >= end;
      const below = frame.depth >= to.depth && frame.left >= to.left && frame.left + frame.total <= end;
      frame.group.classList.toggle("above", above);
      if (above) show(frame, 0, 1);
      else if (below) show(frame, (frame.left - to.left) / to.total, frame.total / to.total);
      else frame.group.setAttribute("display", "none");
    }
  }

  function find(wanted) {
    root.classList.toggle("searched", wanted !== "");
    let found = 0, covered = 0, names = new Set();
    // Frames come in the order of a walk: what lies left of `covered` is counted with its caller.
    for (const frame of frames) {
      const mark = frame.group.classList.contains("c");
      const is = wanted !== "" && !mark && frame.name.toLowerCase().includes(wanted.toLowerCase());
      frame.group.classList.toggle("m", is);
      if (!is) continue;
      names.add(frame.name);
      if (frame.left >= covered) {
        found += frame.total;
        covered = frame.left + frame.total;
      }
    }
    const share = samples ? ((100 * found) / samples).toFixed(2) : "0";
    const plural = names.size === 1 ? "" : "s";
    matched.textContent = wanted ? `${names.size} function${plural}, ${share}% of samples` : "";
  }

  for (const frame of frames) {
    frame.group.addEventListener("click", () => zoom(frame));
    frame.group.addEventListener("mouseenter", () => {
      details.textContent = [...frame.about.replaceAll("\n", " \u2022 ")].slice(0, 160).join("");
    });
    frame.group.addEventListener("mouseleave", () => { details.textContent = ""; });
  }
  search?.addEventListener("input", () => find(search.value));
  document.getElementById("back").addEventListener("click", () => frames.length && zoom(frames[0]));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && frames.length) zoom(frames[0]);
    if (event.key === "/" && search && document.activeElement !== search) {
      event.preventDefault();
      search.focus();
    }
  });
})();
