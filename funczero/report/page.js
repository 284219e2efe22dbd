"use strict";
(() => {
  const page = JSON.parse(document.getElementById("numbers").textContent);
  const thin = (x) => Number(x.toPrecision(6));
  const units = (x, steps, last) => {
    const found = steps.find(([, k]) => Math.abs(x) >= k) || last;
    return Number((x / found[1]).toPrecision(4)) + " " + found[0];
  };
  const words = {
    number: (x) => (Math.abs(x) >= 1e-4 && Math.abs(x) < 1e7) || x === 0 ? thin(x).toLocaleString("en", { maximumFractionDigits: 9 }) : x.toExponential(4),
    bytes: (x) => units(x, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]], ["B", 1]),
    seconds: (x) => units(x, [["s", 1], ["ms", 1e-3], ["us", 1e-6]], ["ns", 1e-9]),
  };

  // the place of the number that is nearest to x; xs ascend
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
  };

  const row = (run, text) => {
    const line = document.createElement("div"), swatch = document.createElement("i");
    const name = document.createElement("span"), value = document.createElement("b");
    swatch.className = "swatch c" + (run % 8);
    name.className = "name";
    name.textContent = page.runs[run];
    value.textContent = text;
    line.append(swatch, name, value);
    return line;
  };

  const follow = (figure, own) => {
    const area = figure.querySelector(".area"), tip = figure.querySelector(".tip");
    if (!area || !own.lines) return;
    const cross = area.querySelector(".cross");
    const hide = () => { tip.style.display = cross.style.display = "none"; };
    area.addEventListener("pointerleave", hide);
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const x = own.x[0] + ((event.clientX - box.left) / box.width) * (own.x[1] - own.x[0]);
      const near = own.lines.filter((line) => line.x.length).map((line) => [line, nearest(line.x, x)]);
      if (!near.length) return hide();
      const distance = ([line, i]) => Math.abs(line.x[i] - x);
      const [best, at] = near.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      const update = best.x[at], part = (update - own.x[0]) / (own.x[1] - own.x[0]);
      const head = document.createElement("p");
      head.textContent = "update " + update.toLocaleString("en");
      tip.replaceChildren(head);
      for (const [line, i] of near) {
        const off = line.x[i] === update ? "" : " (at " + line.x[i].toLocaleString("en") + ")";
        if (Math.abs(line.x[i] - update) <= Math.max(1, (own.x[1] - own.x[0]) / 50)) tip.append(row(line.run, words[own.kind](line.y[i]) + off));
      }
      for (const line of own.lines)
        for (const [when, what] of line.odd)
          if (Math.abs(when - x) <= (own.x[1] - own.x[0]) / 200) tip.append(row(line.run, what + " (at " + when.toLocaleString("en") + ")"));
      cross.style.display = tip.style.display = "block";
      cross.style.left = 100 * part + "%";
      const left = area.offsetLeft + part * box.width, room = figure.clientWidth - tip.offsetWidth;
      tip.style.left = Math.max(0, Math.min(room, left + (left > figure.clientWidth / 2 ? -tip.offsetWidth - 12 : 12))) + "px";
    });
  };

  document.querySelectorAll("figure.chart").forEach((figure, i) => follow(figure, page.charts[i]));
})();
