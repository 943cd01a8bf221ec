// A skeleton player on plain 2D canvases: no network, no libraries, no WebGL.
(() => {
  "use strict";
  const skeletonBlock = document.getElementById("player-skeleton");
  if (!skeletonBlock) return;
  const SKELETON = JSON.parse(skeletonBlock.textContent);
  const JOINTS = SKELETON.parents.length;
  const HOME = { yaw: 0.62, pitch: 0.2, distance: 4.15 };
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const out = new Float32Array(bytes.length / 2);
    for (let i = 0; i < out.length; i++) out[i] = view.getInt16(2 * i, true) / 1000;
    return out;
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    return {
      left: get("--limb-left"), right: get("--limb-right"), middle: get("--limb-middle"), paper: get("--canvas"),
      grid: get("--grid"), shadow: get("--shadow"), ok: get("--good"), bad: get("--bad"), path: get("--muted"),
    };
  }

  class Motion {
    constructor(data) {
      this.fps = data.fps;
      this.frames = data.frames;
      this.xyz = unpack(data.joints);
      this.target = this.smoothedRoot();
      this.feet = SKELETON.toes.map((toe) => this.contacts(toe));
      let lowX = Infinity, highX = -Infinity, lowZ = Infinity, highZ = -Infinity;
      for (let f = 0; f < this.frames; f++) {
        const [x, , z] = this.joint(f, 0);
        lowX = Math.min(lowX, x); highX = Math.max(highX, x);
        lowZ = Math.min(lowZ, z); highZ = Math.max(highZ, z);
      }
      this.centre = [(lowX + highX) / 2, (lowZ + highZ) / 2];
      this.reach = Math.max(highX - lowX, highZ - lowZ);
    }
    joint(frame, j) {
      const i = (frame * JOINTS + j) * 3;
      return [this.xyz[i], this.xyz[i + 1], this.xyz[i + 2]];
    }
    smoothedRoot() {
      const radius = Math.round(this.fps / 2), out = [];
      for (let f = 0; f < this.frames; f++) {
        let x = 0, z = 0, n = 0;
        for (let g = Math.max(0, f - radius); g <= Math.min(this.frames - 1, f + radius); g++) {
          const p = this.joint(g, 0);
          x += p[0]; z += p[2]; n += 1;
        }
        out.push([x / n, z / n]);
      }
      return out;
    }
    contacts(toe) { // 0 in the air, 1 standing, 2 sliding
      const out = [];
      for (let f = 0; f < this.frames; f++) {
        const a = this.joint(Math.max(0, f - 1), toe), b = this.joint(f, toe);
        const speed = Math.hypot(b[0] - a[0], b[2] - a[2]) * this.fps;
        const low = Math.max(a[1], b[1]) < SKELETON.contactHeight;
        out.push(low ? (speed > SKELETON.slideSpeed ? 2 : 1) : 0);
      }
      return out;
    }
  }

  class Player {
    constructor(element) {
      this.element = element;
      const data = JSON.parse(element.querySelector(".player-data").textContent);
      this.motions = data.panels.map((p) => new Motion(p));
      this.canvases = [...element.querySelectorAll("canvas")];
      this.duration = Math.max(...this.motions.map((m) => (m.frames - 1) / m.fps), 0.05);
      this.time = 0;
      this.playing = false;
      this.visible = false;
      this.userPaused = calm;
      this.view = { ...HOME };
      this.find = (name) => element.querySelector("." + name);
      this.bind();
      const observer = new IntersectionObserver((entries) => {
        this.visible = entries.some((e) => e.isIntersecting);
        if (this.visible && !this.userPaused) this.play(true);
        this.draw();
      }, { threshold: 0.15 });
      observer.observe(element);
      new ResizeObserver(() => this.draw()).observe(element);
      this.draw();
    }
    bind() {
      this.find("play").addEventListener("click", () => { this.userPaused = this.playing; this.play(!this.playing); });
      this.find("reset").addEventListener("click", () => { this.view = { ...HOME }; this.draw(); });
      this.find("follow").addEventListener("change", () => this.draw());
      this.find("scrub").addEventListener("input", (e) => {
        this.userPaused = true;
        this.play(false);
        this.seek((e.target.value / 1000) * this.duration);
      });
      for (const canvas of this.canvases) {
        let last = null;
        canvas.addEventListener("pointerdown", (e) => {
          last = [e.clientX, e.clientY];
          canvas.setPointerCapture(e.pointerId);
        });
        canvas.addEventListener("pointermove", (e) => {
          if (!last) return;
          this.orbit((e.clientX - last[0]) * -0.01, (e.clientY - last[1]) * 0.007);
          last = [e.clientX, e.clientY];
        });
        for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
        canvas.addEventListener("wheel", (e) => { // only after a click into the canvas: the page must stay scrollable
          if (document.activeElement !== canvas) return;
          e.preventDefault();
          this.zoom(Math.exp(e.deltaY * 0.001));
        }, { passive: false });
        canvas.addEventListener("keydown", (e) => this.key(e));
      }
    }
    key(e) {
      const turn = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, 0.08], ArrowDown: [0, -0.08] }[e.key];
      const frame = 1 / Math.max(...this.motions.map((m) => m.fps));
      if (turn) this.orbit(...turn);
      else if (e.key === " ") { this.userPaused = this.playing; this.play(!this.playing); }
      else if (e.key === "+" || e.key === "=") this.zoom(0.9);
      else if (e.key === "-") this.zoom(1.1);
      else if (e.key === "." || e.key === ",") {
        this.userPaused = true;
        this.play(false);
        this.seek(this.time + (e.key === "." ? frame : -frame));
      } else if (e.key === "r") { this.view = { ...HOME }; this.draw(); }
      else return;
      e.preventDefault();
    }
    orbit(yaw, pitch) {
      this.view.yaw += yaw;
      this.view.pitch = Math.min(1.4, Math.max(-0.05, this.view.pitch + pitch));
      this.draw();
    }
    zoom(factor) {
      this.view.distance = Math.min(12, Math.max(1.6, this.view.distance * factor));
      this.draw();
    }
    play(on) {
      if (on === this.playing) return;
      this.playing = on;
      const button = this.find("play");
      button.textContent = on ? "Pause" : "Play";
      button.setAttribute("aria-pressed", String(on));
      if (!on) return;
      let before = null;
      const tick = (now) => {
        if (!this.playing) return;
        if (!this.visible) { this.play(false); return; }
        if (before !== null) {
          let next = this.time + ((now - before) / 1000) * Number(this.find("speed").value);
          if (next > this.duration + 0.4) next = 0; // rest on the last pose before starting over
          this.seek(next);
        }
        before = now;
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    }
    seek(time) {
      this.time = Math.max(0, Math.min(time, this.duration + 0.41));
      const shown = Math.min(this.time, this.duration);
      this.find("scrub").value = String(Math.round((1000 * shown) / this.duration));
      this.find("clock").textContent = `${shown.toFixed(1)} / ${this.duration.toFixed(1)} s`;
      this.draw();
    }
    draw() {
      const palette = colours();
      this.motions.forEach((motion, i) => this.drawPanel(this.canvases[i], motion, palette));
    }
    drawPanel(canvas, motion, palette) {
      const width = canvas.clientWidth, height = canvas.clientHeight;
      if (!width || !height) return;
      const ratio = window.devicePixelRatio || 1;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      const ctx = canvas.getContext("2d");
      ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
      ctx.clearRect(0, 0, width, height);
      const frame = Math.min(motion.frames - 1, Math.floor(this.time * motion.fps + 1e-6));
      const follow = this.find("follow").checked;
      const [tx, tz] = follow ? motion.target[frame] : motion.centre;
      const distance = this.view.distance + (follow ? 0 : 0.9 * motion.reach);
      const cy = Math.cos(this.view.yaw), sy = Math.sin(this.view.yaw);
      const cp = Math.cos(this.view.pitch), sp = Math.sin(this.view.pitch);
      const focal = Math.min(width * 1.5, height * 1.72);
      const project = (x, y, z) => { // -> [screen x, screen y, depth, pixels per metre]
        const dx = x - tx, dy = y - 0.88, dz = z - tz;
        const px = cy * dx - sy * dz, forward = sy * dx + cy * dz;
        const depth = distance - (cp * forward + sp * dy);
        const scale = focal / Math.max(depth, 0.3);
        return [width / 2 + px * scale, height / 2 - (cp * dy - sp * forward) * scale, depth, scale];
      };
      const stroke = (a, b, colour, size, alpha = 1) => {
        if (a[2] < 0.35 || b[2] < 0.35) return;
        ctx.globalAlpha = alpha;
        ctx.strokeStyle = colour;
        ctx.lineWidth = size;
        ctx.beginPath();
        ctx.moveTo(a[0], a[1]);
        ctx.lineTo(b[0], b[1]);
        ctx.stroke();
      };
      const dot = (p, radius, colour, alpha = 1, squash = 1) => {
        ctx.globalAlpha = alpha;
        ctx.fillStyle = colour;
        ctx.beginPath();
        ctx.ellipse(p[0], p[1], radius, radius * squash, 0, 0, 2 * Math.PI);
        ctx.fill();
      };
      ctx.lineCap = "round";
      ctx.lineJoin = "round";
      this.floor(project, stroke, palette, tx, tz);
      this.path(motion, frame, project, stroke, palette);

      const points = [];
      for (let j = 0; j < JOINTS; j++) points.push(project(...motion.joint(frame, j)));
      for (let j = 1; j < JOINTS; j++) { // the shadow ties the figure to the floor
        const a = motion.joint(frame, j), b = motion.joint(frame, SKELETON.parents[j]);
        stroke(project(a[0], 0, a[2]), project(b[0], 0, b[2]), palette.shadow, 4, 0.55);
      }
      SKELETON.toes.forEach((toe, i) => {
        const state = motion.feet[i][frame];
        if (!state) return;
        const [x, , z] = motion.joint(frame, toe);
        const p = project(x, 0, z);
        dot(p, 0.085 * p[3], state === 2 ? palette.bad : palette.ok, 0.6, 0.25 + 0.75 * Math.abs(sp));
      });
      const bones = [];
      for (let j = 1; j < JOINTS; j++) bones.push([j, points[j][2] + points[SKELETON.parents[j]][2]]);
      bones.sort((a, b) => b[1] - a[1]);
      for (const [j] of bones) {
        const a = points[j], b = points[SKELETON.parents[j]];
        const size = Math.max(2.5, 0.042 * (a[3] + b[3]) / 2);
        stroke(a, b, palette.paper, size + 3);
        stroke(a, b, palette[SKELETON.sides[j]], size);
        if (j === SKELETON.head) dot(a, Math.max(4, 0.085 * a[3]), palette.middle);
      }
      for (const toe of SKELETON.toes) dot(points[toe], Math.max(2.5, 0.026 * points[toe][3]), palette[SKELETON.sides[toe]]);
      ctx.globalAlpha = 1;
    }
    floor(project, stroke, palette, tx, tz) {
      const step = 0.5, reach = 2.5, x0 = Math.round(tx / step) * step, z0 = Math.round(tz / step) * step;
      for (let i = -reach; i <= reach + 1e-6; i += step) {
        for (let k = -reach; k < reach - 1e-6; k += step) {
          for (const [a, b] of [[[i, k], [i, k + step]], [[k, i], [k + step, i]]]) {
            const fade = 1 - Math.hypot((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) / (reach + 0.3);
            if (fade <= 0) continue;
            stroke(project(x0 + a[0], 0, z0 + a[1]), project(x0 + b[0], 0, z0 + b[1]), palette.grid, 1, fade);
          }
        }
      }
    }
    path(motion, frame, project, stroke, palette) {
      for (let f = 1; f < motion.frames; f++) {
        const a = motion.joint(f - 1, 0), b = motion.joint(f, 0);
        stroke(project(a[0], 0, a[2]), project(b[0], 0, b[2]), palette.path, 1.5, f <= frame ? 0.7 : 0.22);
      }
    }
  }

  const players = [...document.querySelectorAll(".player")].map((element) => new Player(element));
  const redraw = () => players.forEach((p) => p.draw());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new MutationObserver(redraw).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  window.addEventListener("beforeprint", () => players.forEach((p) => { p.play(false); p.seek(p.duration / 2); }));
  players.forEach((p) => p.seek(0));
})();
