// Fetches what a live page shows again now and then, and puts it in place of what is there.
"use strict";
(() => {
  const EVERY = 5000;
  const SLOWEST = 60000;
  if (!document.body.hasAttribute("data-live")) return;
  const status = document.querySelector(".live");
  let pause = EVERY;
  const isBusy = () => {
    const main = document.getElementById("content");
    const within = document.activeElement;
    const selection = document.getSelection();
    return document.hidden
      || (within !== main && main.contains(within) && within.matches("input, select, textarea, button"))
      || (selection && !selection.isCollapsed)
      || main.querySelector("dialog[open], details.confirm[open]");
  };
  const show = (text) => {
    status.hidden = false;
    if (status.textContent !== text) status.textContent = text;
  };
  const opened = (main) => new Set([...main.querySelectorAll("details[open][id]")].map((part) => part.id));
  const load = async () => {
    if (isBusy()) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const [now, next] = [document.getElementById("content"), page.getElementById("content")];
      if (!next || isBusy()) return;
      if (now.innerHTML !== next.innerHTML) {
        const open = opened(now);
        const focused = now.contains(document.activeElement) ? document.activeElement.id : "";
        now.replaceChildren(...next.childNodes);
        for (const id of open) document.getElementById(id)?.setAttribute("open", "");
        if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
      }
      document.title = page.title;
      pause = EVERY;
      show("Live");
      if (!page.body.hasAttribute("data-live")) {
        document.body.removeAttribute("data-live");
        show("Final");
      }
    } catch {
      pause = Math.min(pause * 2, SLOWEST);
      show("The scheduler does not answer; trying again");
    }
  };
  const round = async () => {
    await load();
    if (document.body.hasAttribute("data-live")) setTimeout(round, pause);
  };
  show("Live");
  setTimeout(round, EVERY);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
})();
